"""python -m adaptmerge"""

from adaptmerge.cli import main

if __name__ == "__main__":
    main()
