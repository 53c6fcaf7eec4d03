"""python -m ensemble.export ; see __init__.py."""

from ensemble.export import main

if __name__ == "__main__":
    main()
