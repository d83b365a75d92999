"""What a run needs of machines: devices, processes, memory, the compiler, and checkpoints."""
