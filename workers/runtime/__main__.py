"""`python -m workers.runtime SPEC`: a worker or the describer, as the supervisor starts them."""

from workers.runtime.launch import main

main()
