"""Devices, processes and timing."""
