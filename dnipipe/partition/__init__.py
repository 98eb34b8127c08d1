"""How a model is cut into stages; knows nothing of processes or schedules."""

from dnipipe.partition.sequential import split_sequential as split_sequential
