"""Devices, processes and disks."""
