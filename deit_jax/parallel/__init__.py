"""Devices and processes: meshes, collectives, preemption."""
