from lineage_jax.cli import main

main()
