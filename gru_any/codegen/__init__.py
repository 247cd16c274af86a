"""From the equations to code: traced programs, their schedule, and a printer for each target."""
