"""Everything that touches Ray or DeepSpeed: the jobs, and the streams, engines and sweeps they run on."""
