"""The attention kernels beside other libraries', their tiles, and the limits of the hardware."""
