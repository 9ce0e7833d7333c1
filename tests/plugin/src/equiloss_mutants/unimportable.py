"""A module that needs something which is not there."""

import no_such_package

import_error = no_such_package.loss
