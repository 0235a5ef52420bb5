"""Nets that simulate waves, compressed before training: the 2-D wave equation by finite elements, a step predictor and a U-Net, and one-way convolutions.

Run it with `fxpress demo wave`, or piece by piece: `fem` solves the equation, `data` makes the tasks, `nets` holds both nets and their errors.
"""
