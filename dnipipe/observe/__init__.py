"""What a run shows of itself: where its time went, its numbers, how far it is. Imports nothing else of dnipipe.

trace.py records spans, perfetto.py and timeline.py show them; metrics.py and progress.py are for files and for eyes.
"""
