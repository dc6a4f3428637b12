"""Programming languages by the names of files, as GitHub's linguist names them."""

import re

_EXTENSIONS = """
Ada: adb ads | Agda: agda | Assembly: asm s nasm | Awk: awk | Batchfile: bat cmd | C: c h | C#: cs | C++: cpp cc cxx hpp hh hxx ipp inl |
CMake: cmake | COBOL: cob cbl | CSS: css | CUDA: cu cuh | Clojure: clj cljs cljc edn | CoffeeScript: coffee | Common Lisp: lisp lsp cl |
Crystal: cr | D: d | Dart: dart | Dockerfile: dockerfile | Elixir: ex exs | Elm: elm | Emacs Lisp: el | Erlang: erl hrl |
F#: fs fsi fsx | Fortran: f f90 f95 f03 f08 for | GLSL: glsl vert frag | Go: go | GraphQL: graphql gql | Groovy: groovy gradle | HCL: tf hcl |
HTML: html htm xhtml | Haskell: hs lhs | INI: ini cfg | Idris: idr | Isabelle: thy | JSON: json | Java: java | JavaScript: js jsx mjs cjs |
Julia: jl | Kotlin: kt kts | Lean: lean | Less: less | Lua: lua | Makefile: mk mak | Markdown: md markdown | Metal: metal |
Nim: nim | Nix: nix | OCaml: ml mli | Objective-C: m mm | PHP: php | PLSQL: pks pkb | Pascal: pas pp | Perl: pl pm | PowerShell: ps1 psm1 psd1 |
Prolog: pro prolog | Protocol Buffer: proto | Python: py pyi pyx pxd | R: r | Racket: rkt | Roff: man 1 3 | Ruby: rb rake gemspec | Rust: rs |
SCSS: scss | SQL: sql | Sass: sass | Scala: scala sc | Scheme: scm ss | Shell: sh bash zsh ksh | Smalltalk: st | Solidity: sol | Starlark: bzl |
Stan: stan | Svelte: svelte | Swift: swift | SystemVerilog: sv svh | TOML: toml | Tcl: tcl | TeX: tex sty cls bib | Text: txt |
Thrift: thrift | TypeScript: ts tsx mts cts | VHDL: vhd vhdl | Verilog: v | Vim Script: vim | Visual Basic: vb bas | Vue: vue | WebAssembly: wat |
XML: xml xsd xsl xslt | YAML: yaml yml | Yacc: y yy | Zig: zig | fish: fish | reStructuredText: rst
"""
_NAMES = """
Makefile: makefile gnumakefile | CMake: cmakelists.txt | Dockerfile: dockerfile containerfile | Ruby: rakefile gemfile podfile vagrantfile |
Groovy: jenkinsfile | Starlark: build workspace build.bazel | Python: sconstruct sconscript wscript | Go: go.mod |
Shell: .bashrc .zshrc .profile | Vim Script: .vimrc
"""
_PROGRAMS = {"python": "Python", "bash": "Shell", "sh": "Shell", "zsh": "Shell", "ksh": "Shell", "perl": "Perl", "ruby": "Ruby"} | {
    "node": "JavaScript",
    "php": "PHP",
    "lua": "Lua",
    "tclsh": "Tcl",
    "awk": "Awk",
    "make": "Makefile",
    "Rscript": "R",
}


def _table(text: str) -> dict[str, str]:
    rows = (row.partition(":") for row in text.replace("\n", " ").split("|"))
    return {key: language.strip() for language, _, keys in rows for key in keys.split()}


EXTENSIONS, NAMES = _table(_EXTENSIONS), _table(_NAMES)
SHEBANG = re.compile(r"#!\s*(?:\S*/env\s+(?:-\S+\s+|\w+=\S+\s+)*)?(?:\S*/)?([A-Za-z]+)")


def language(path: str, text: str = "") -> str:
    """By the file's name, else its extension, else, for one without, by the program that its first line calls; empty where none says it."""
    name = path.rpartition("/")[2].lower()
    stem, dot, extension = name.rpartition(".")
    if known := NAMES.get(name) or (EXTENSIONS.get(extension) if dot else None):
        return known
    program = SHEBANG.match(text[:200]) if not (dot and stem) else None
    return _PROGRAMS.get(program.group(1), "") if program else ""
