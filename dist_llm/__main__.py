"""`python -m dist_llm`: the same entry as the `dist-llm` console script."""

from dist_llm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
