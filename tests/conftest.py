import torch

torch.set_num_threads(1)  # the tests' models are small: more threads only fight for the cores
