"""Pipeline parallelism: a training step is a program over lanes, generated, verified and run."""
