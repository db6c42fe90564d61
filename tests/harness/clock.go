package harness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// clockVariable tells a program of [Clock] by how many seconds its clock is
// wrong. Linux has no namespace for the time of day, and changing it would
// change it for the whole machine.
const clockVariable = "HARNESS_CLOCK_SECONDS"

// Clock runs the role, and the commands on its host, with a clock that is off
// by d: ahead when d is positive; 0 is an ordinary program. Only the time of day is: what is measured
// while the program runs is right, as on a host with a wrong clock.
func Clock(d time.Duration) Option { return func(o *options) { o.clock = d } }

// SetClock changes the clock for the next Start and for commands.
func (r *Role) SetClock(d time.Duration) {
	r.site.t.Helper()
	if r.opts.clock == 0 {
		r.site.t.Fatalf("%s was not started with a clock that can be set", r.Name)
	}
	r.opts.clock = d
	r.SetEnv(clockVariable, clockValue(d))
}

func clockValue(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }

// program returns the path of the role's own build of one of our programs.
func (r *Role) program(name string) string {
	r.site.t.Helper()
	if r.opts.clock == 0 {
		return r.site.Program(name)
	}
	dir, err := clockPrograms()
	if err != nil {
		r.site.t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// environment is that of a program on the role's host.
func (r *Role) environment(env map[string]string) []string {
	all := environment(env)
	if r.opts.clock != 0 {
		all = append(all, clockVariable+"="+clockValue(r.opts.clock))
	}
	return all
}

var clockPrograms = sync.OnceValues(func() (string, error) { return buildClock(context.Background()) })

// What is changed in the standard library's package time: all of Go asks
// time.Now for the time of day. Programs link with it as they were compiled for
// the original only as long as its declarations are numbered as before: so Now
// stays on its lines, and there is one new variable in a file that comes last,
// but no function.
const (
	nowWas = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	nowIs  = "func Now() Time {\n\tsec, nsec, mono := runtimeNow(); " +
		"if clockOff != \"\" { off, sign := int64(0), int64(1); " +
		"for _, c := range []byte(clockOff) { if c == '-' { sign = -1; continue }; off = 10*off + int64(c-'0') }; " +
		"sec += sign * off }\n"
	clockFile   = "zz_clock_off.go"
	clockSource = `
package time

import "syscall"

// clockOff is by how many seconds the clock of this test program is wrong.
var clockOff, _ = syscall.Getenv("` + clockVariable + `")
`
	// clockTool stands before each tool of the go command and gives the linker
	// our package time instead of the original: compiling all that uses time
	// anew would take minutes, this is one package and one more link. What the
	// linker compares has positions in it; so the compiler has to name the file
	// as it does in the standard library.
	clockTool = `#!/bin/sh
set -e
tool=$1
shift
case $tool in
*/compile)
	before= n=$#
	while [ "$n" -gt 0 ]; do
		arg=$1
		shift
		if [ "$before" = -trimpath ]; then
			arg=$(printf %s "$arg" | sed "s|=>$HARNESS_CLOCK_ROOT/|=>\$GOROOT/|g")
		fi
		set -- "$@" "$arg"
		before=$arg n=$((n - 1))
	done
	;;
*/link)
	before=
	for arg; do
		if [ "$before" = -importcfg ]; then
			sed -i "s|^packagefile time=.*|packagefile time=$HARNESS_CLOCK_ARCHIVE|" "$arg"
			grep -qx "packagefile time=$HARNESS_CLOCK_ARCHIVE" "$arg" || { echo "the linker gets no package time in $arg" >&2; exit 1; }
		fi
		before=$arg
	done
	;;
esac
exec "$tool" "$@"
`
)

// buildClock makes the programs whose clock can be set in a cached directory.
// They are the ordinary ones, linked with another package time.
func buildClock(ctx context.Context) (string, error) {
	if _, err := programs(); err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("go env GOROOT: %w", err)
	}
	goroot := strings.TrimSpace(string(out))
	original := filepath.Join(goroot, "src", "time", "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		return "", err
	}
	if n := bytes.Count(source, []byte(nowWas)); n != 1 {
		return "", fmt.Errorf("%s holds the beginning of time.Now %d times: this release of Go has another, change the text in the harness", original, n)
	}
	edited := bytes.Replace(source, []byte(nowWas), []byte(nowIs), 1)

	kind, flags, env := buildKind()
	hash := sha256.New()
	for _, text := range []string{string(edited), clockSource, clockTool} {
		fmt.Fprintf(hash, "%d %s", len(text), text)
	}
	// The go command does not know what the tool does: it takes a package or a
	// program for up to date when the sources are. So what they are made by
	// stands in the source and in the directory's name.
	made := hex.EncodeToString(hash.Sum(nil)[:6])
	added := "// Made by " + made + ".\n" + clockSource
	dir, unlock, err := lockPrograms(kind + "-clock-" + made)
	if err != nil {
		return "", err
	}
	defer unlock()

	file := func(name string) string { return filepath.Join(dir, name) }
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{
		original: file("time.go.txt"), filepath.Join(filepath.Dir(original), clockFile): file("clock_off.go.txt"),
	}})
	if err != nil {
		return "", err
	}
	for name, content := range map[string][]byte{"time.go.txt": edited, "clock_off.go.txt": []byte(added), "overlay.json": overlay} {
		if err := os.WriteFile(file(name), content, 0o644); err != nil {
			return "", err
		}
	}
	if err := os.WriteFile(file("tool.sh"), []byte(clockTool), 0o755); err != nil {
		return "", err
	}
	root, err := Repository()
	if err != nil {
		return "", err
	}
	archive := file("time.a")
	for _, args := range [][]string{
		append([]string{"build", "-toolexec", file("tool.sh"), "-overlay", file("overlay.json"), "-o", archive}, append(flags, "time")...),
		append([]string{"build", "-toolexec", file("tool.sh"), "-o", dir + string(filepath.Separator)}, append(flags, "./cmd/sallyport")...),
	} {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir, cmd.Env = root, append(env, "HARNESS_CLOCK_ROOT="+goroot, "HARNESS_CLOCK_ARCHIVE="+archive)
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build the programs with a clock of their own: %w\n%s", err, out)
		}
	}
	return dir, nil
}
