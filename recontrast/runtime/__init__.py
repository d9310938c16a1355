"""Devices, processes and clocks: how a run is executed."""
