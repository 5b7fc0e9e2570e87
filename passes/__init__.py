"""One file, one pass: ``GraphModule -> GraphModule``. Their order is in `nm_compiler.recipe.pipeline`."""

if __name__ != "nm_compiler.passes":
    raise ImportError("import nm_compiler.passes: a second copy would register every op twice")
