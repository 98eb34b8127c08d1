"""How a model is cut into stages, and what its layers cost; knows nothing of processes or schedules."""

from dnipipe.partition.balance import balanced_cuts as balanced_cuts
from dnipipe.partition.cost import LayerCost as LayerCost
from dnipipe.partition.cost import each_layer as each_layer
from dnipipe.partition.cost import measure_layers as measure_layers
from dnipipe.partition.cost import stage_costs as stage_costs
from dnipipe.partition.decoder import decoder_as_sequential as decoder_as_sequential
from dnipipe.partition.decoder import export_hf as export_hf
from dnipipe.partition.decoder import hf_names as hf_names
from dnipipe.partition.decoder import split_decoder as split_decoder
from dnipipe.partition.decoder import tied_weight as tied_weight
from dnipipe.partition.sequential import cut_sequential as cut_sequential
from dnipipe.partition.sequential import split_sequential as split_sequential
from dnipipe.partition.ties import Tie as Tie
from dnipipe.partition.ties import part_ties as part_ties
from dnipipe.partition.ties import shared_names as shared_names
