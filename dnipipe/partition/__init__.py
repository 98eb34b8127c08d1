"""How a model is cut into stages, and what its layers cost; knows nothing of processes or schedules."""

from dnipipe.partition.cost import LayerCost as LayerCost
from dnipipe.partition.cost import each_layer as each_layer
from dnipipe.partition.cost import measure_layers as measure_layers
from dnipipe.partition.cost import stage_costs as stage_costs
from dnipipe.partition.sequential import split_sequential as split_sequential
