"""HDF5 recordings of robomimic and robosuite, read and written."""
