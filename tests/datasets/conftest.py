"""Damage for the files of a test module that has a fixture `path`."""

import h5py
import pytest


@pytest.fixture
def edit(path):
    """Opens the group `data` of the file for changes."""

    class Edit:
        def __enter__(self):
            self.file = h5py.File(path, "r+")
            return self.file["data"]

        def __exit__(self, *_):
            self.file.close()

    return Edit
