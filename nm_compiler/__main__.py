"""``python -m nm_compiler``: the same as ``nm-compiler``, for where scripts are not on the path."""

from nm_compiler.cli import main

raise SystemExit(main())
