"""A search on a Ray cluster: candidates are built anywhere and measured where the device is.

`device_node` runs on the device and imports neither PyTorch nor Ray.
"""
