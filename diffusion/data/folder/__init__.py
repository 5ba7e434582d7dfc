"""A folder of pictures as a data set: python -m diffusion.data.folder DIR --name=NAME --size=64 (docs/own_data.md)."""
