"""The feed-forward experiments of Jaderberg et al. 2016, Decoupled Neural Interfaces using Synthetic Gradients.

One file for each experiment; they never import each other. What they share, from the bottom:

    models, convolutions    what a network is; convolutions also builds one
    plain                   one model, of plain modules, trained the slow way: what the tests hold all else against
    stacked, convolved      the parts of many models at once; layout
    fused, fused_pool       their normalisation and Adam; that of pictures, with pooling; *kernels: the same on a GPU
    stack                   many models that train at once, whatever their methods
    batches, captured       images on the device; several steps in one call, on a GPU a captured graph
    job, training, running  what to train; one stack under way; all of them, side by side, until time is up
    order, recipe           the command line; how long and how fast
    rows, results, figures  what came out, beside the paper

throughput.py measures how fast all that is.
"""
