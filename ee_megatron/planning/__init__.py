"""What a run will take, before it runs: layout, parameters, memory, FLOPs and time, by arithmetic that tests hold
against measurements. Nothing here starts a process or reads a weight."""
