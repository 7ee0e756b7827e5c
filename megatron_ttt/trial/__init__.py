"""What a machine with GPUs is asked on its first day, in stages: ``tools/gpu_trial.py``."""
