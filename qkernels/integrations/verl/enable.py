"""Importing this installs the heads: for `model.external_lib` in verl's configuration."""

from .heads import install

install()
