"""What happens after training: reports and checks of the frozen weights; backends are lowered from here."""

if __name__ != "nm_compiler.runtime":
    raise ImportError("import nm_compiler.runtime: a second copy would register every op twice")
