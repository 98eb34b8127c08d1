"""The trainer: one config in, one folder out."""

from .data import read_corpus as read_corpus
from .trainer import Trainer as Trainer
