"""The feed-forward experiments of Jaderberg et al. 2016, Decoupled Neural Interfaces using Synthetic Gradients.

One file for each experiment; they never import each other. What they share: models.py, stacked.py and stack.py (many
models at once), plain.py (one model, of plain modules), recipe.py, batches.py, running.py, rows.py, results.py.
"""
