"""Train with the installed package and this folder's conf: `python train.py experiment=small`."""

from equiloss.launching.project import train

if __name__ == "__main__":
    import sys

    train(sys.argv[1:])
