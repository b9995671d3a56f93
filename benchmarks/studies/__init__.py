"""Studies whose results the documentation shows: parity with diffusers, and solvers by steps."""
