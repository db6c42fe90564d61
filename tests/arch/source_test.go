package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "sallyport"

// source is one parsed Go file of a module.
type source struct {
	name string // slash-separated, relative to the module's root
	pkg  string // import path of its directory
	file *ast.File
	fset *token.FileSet
}

// test reports whether the file is compiled into tests only.
func (s source) test() bool { return strings.HasSuffix(s.name, "_test.go") }

// in reports whether the file's package is one of the trees. A tree is an
// import path below the module ("internal/channel") with all below it.
func (s source) in(trees ...string) bool {
	for _, t := range trees {
		if within(s.pkg, module+"/"+t) {
			return true
		}
	}
	return false
}

// imports lists the import paths of the file.
func (s source) imports() []string {
	var paths []string
	for _, spec := range s.file.Imports {
		if p, err := strconv.Unquote(spec.Path.Value); err == nil {
			paths = append(paths, p)
		}
	}
	return paths
}

// identifiers lists the places, as file:line, where one of the names is used.
func (s source) identifiers(names ...string) []string {
	var places []string
	ast.Inspect(s.file, func(n ast.Node) bool {
		id, ok := n.(*ast.Ident)
		if !ok {
			return true
		}
		for _, name := range names {
			if id.Name == name {
				places = append(places, s.name+":"+strconv.Itoa(s.fset.Position(id.Pos()).Line))
			}
		}
		return true
	})
	return places
}

// calls lists the places where a function of an imported package is named.
func (s source) calls(pkg, name string) []string {
	var places []string
	ast.Inspect(s.file, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok || sel.Sel.Name != name {
			return true
		}
		if id, ok := sel.X.(*ast.Ident); ok && id.Name == pkg {
			places = append(places, s.name+":"+strconv.Itoa(s.fset.Position(sel.Pos()).Line))
		}
		return true
	})
	return places
}

// within reports whether an import path is tree or below it.
func within(pkg, tree string) bool { return pkg == tree || strings.HasPrefix(pkg, tree+"/") }

// repository is the root of the module that this test belongs to.
func repository(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		t.Fatalf("the module's root: %v", err)
	}
	return dir
}

// parse reads every Go file of the module at root, modules below it excepted.
func parse(t *testing.T, root string) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil && name != root {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		all = append(all, source{name: rel, pkg: path.Join(module, path.Dir(rel)), file: file, fset: fset})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatalf("no Go file below %s", root)
	}
	return all
}

// deps lists all packages that the program in dir links. It changes no go.mod.
func deps(t *testing.T, root, dir string) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-mod=readonly", "-deps", "./"+dir)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOWORK=off")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list -deps ./%s in %s: %v\n%s", dir, root, err, stderr.String())
	}
	return strings.Fields(string(out))
}

// synthetic writes a module of its own: files maps names to contents. The
// foreign modules are replaced by empty packages, so that nothing is fetched.
func synthetic(t *testing.T, files map[string]string, foreign ...string) string {
	t.Helper()
	root := t.TempDir()
	mod := "module " + module + "\n\ngo 1.26.0\n"
	for i, name := range foreign {
		dir := "foreign" + strconv.Itoa(i)
		mod += "\nrequire " + name + " " + version(name) + "\nreplace " + name + " => ./" + dir + "\n"
		write(t, filepath.Join(root, dir, "go.mod"), "module "+name+"\n")
		write(t, filepath.Join(root, dir, "p.go"), "package p\n")
	}
	write(t, filepath.Join(root, "go.mod"), mod)
	for name, content := range files {
		write(t, filepath.Join(root, filepath.FromSlash(name)), content)
	}
	return root
}

// version is one that fits a module path: v2.0.0 for .../v2.
func version(name string) string {
	if major, ok := strings.CutPrefix(path.Base(name), "v"); ok {
		if _, err := strconv.Atoi(major); err == nil {
			return "v" + major + ".0.0"
		}
	}
	return "v0.0.0"
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}
