"""The mathematics: noise schedules, timesteps, parameterizations and solvers, as tables."""
