package harness

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// RaceVariable builds the programs with the race detector when it is "1". They
// are slower then: deadlines of the contract are for ordinary builds.
const RaceVariable = "SALLYPORT_TEST_RACE"

var programs = sync.OnceValues(func() (string, error) { return build(context.Background()) })

// build makes all programs in a cached directory. The test programs of several
// packages share it, one at a time; the go command leaves what is up to date.
func build(ctx context.Context) (string, error) {
	kind, flags, env := buildKind()
	root, err := Repository()
	if err != nil {
		return "", err
	}
	if err := touchSources(root); err != nil {
		return "", err
	}
	dir, unlock, err := lockPrograms(kind)
	if err != nil {
		return "", err
	}
	defer unlock()
	args := append([]string{"build", "-o", dir + string(filepath.Separator)}, append(flags, "./cmd/...")...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = root, env
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return dir, nil
}

// buildKind is how the programs are built: flags and environment of the go
// command.
func buildKind() (kind string, flags, env []string) {
	if os.Getenv(RaceVariable) == "1" {
		return "race", []string{"-race"}, append(os.Environ(), "CGO_ENABLED=1")
	}
	return "static", nil, append(os.Environ(), "CGO_ENABLED=0")
}

// touchSources makes every source file an input of the test: go test caches
// results by the files that a test looked at, and cannot know that the
// programs are made of these.
func touchSources(root string) error {
	return filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && name != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if ext := filepath.Ext(name); ext == ".go" || ext == ".sql" || ext == ".mod" {
			_, err = os.Stat(name)
		}
		return err
	})
}

// Repository returns the root of this module.
func Repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", fmt.Errorf("no go.mod above the working directory")
		}
		dir = parent
	}
}

// lockPrograms makes the cached directory for programs of one kind, and keeps
// other test processes out of it until unlock.
func lockPrograms(kind string) (dir string, unlock func(), err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	dir = filepath.Join(cache, "sallyport-tests", kind)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		_ = lock.Close()
		return "", nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	return dir, func() { _ = lock.Close() }, nil // which unlocks
}
