"""A trained run used: its network on new pictures, what it says of itself, and its export."""
