"""Training Qwen3-VL-MoE: `python -m train CONFIG.yaml`.

config.py reads the YAML, loop.py is the program from top to bottom, step.py the one jitted function it runs.
"""
