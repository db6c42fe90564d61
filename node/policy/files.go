package policy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
	"sallyport/node/proc"
)

// filesPlan is a files policy whose paths are resolved and allowed.
type filesPlan struct {
	spec  wire.FilesSpec
	wants []snapshot // in the order of the spec; the owner is that of the file replaced
}

// planFiles checks everything that can be checked without changing anything.
func (e *Engine) planFiles(spec wire.FilesSpec) (filesPlan, error) {
	plan := filesPlan{spec: spec}
	if err := spec.Check(); err != nil {
		return plan, err
	}
	for _, command := range [][]string{spec.Validate, spec.Reload} {
		if len(command) > 0 {
			if _, err := e.cfg.Commands.Resolve(command[0], commandsVariable); err != nil {
				return plan, err
			}
		}
	}
	seen := map[string]bool{}
	for _, f := range spec.Files {
		resolved, err := e.cfg.Bounds.Resolve(f.Path)
		if err != nil {
			return plan, err
		}
		if seen[resolved] {
			return plan, fmt.Errorf("%s stands there twice, through a symbolic link", f.Path)
		}
		seen[resolved] = true
		mode, err := f.Perm()
		if err != nil {
			return plan, err
		}
		plan.wants = append(plan.wants, snapshot{Path: resolved, Kind: kindFile, Mode: mode, Content: []byte(f.Content)})
	}
	return plan, nil
}

func (p filesPlan) paths() []string {
	paths := make([]string, len(p.wants))
	for i, w := range p.wants {
		paths[i] = w.Path
	}
	return paths
}

// applyFiles brings all files of the plan, or none: what a failed step leaves
// is put back, also after a crash in the middle, for which the journal is on
// disk first. previous are the paths that the policy owned until now; those it
// no longer names are restored. commit is called once all is in place and
// before the journal goes: it records whose the paths are.
func (e *Engine) applyFiles(ctx context.Context, name string, plan filesPlan, previous []string, commit func() error) error {
	if err := e.finish(ctx); err != nil {
		return err
	}
	var found, undo, todo []snapshot
	for _, want := range plan.wants {
		have, err := read(want.Path)
		if err != nil {
			return err
		}
		found = append(found, have)
		if have.same(want) {
			continue
		}
		want.succeed(have)
		undo, todo = append(undo, have), append(todo, want)
	}
	var dropped []string
	for _, path := range previous {
		if e.ownedByOther(path, name) || slices.Contains(plan.paths(), path) {
			continue
		}
		if original, ok := e.originals.get(path); ok {
			have, err := read(path)
			if err != nil {
				return err
			}
			undo, todo, dropped = append(undo, have), append(todo, original), append(dropped, path)
		}
	}
	for _, have := range found { // also where nothing has to change yet: drift comes later
		if err := e.originals.add(have); err != nil { // no-op for a path that is ours already
			return fmt.Errorf("save %s: %w", have.Path, err)
		}
	}
	if len(todo) == 0 {
		return commit()
	}
	if err := e.journal(name, undo, plan.spec.Reload); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	err := e.swap(ctx, plan.spec, todo)
	if err == nil {
		err = commit()
	}
	if err != nil {
		if rerr := e.rollback(context.WithoutCancel(ctx)); rerr != nil {
			return errors.Join(err, fmt.Errorf("put back what was there: %w", rerr)) // finish tries again
		}
		e.forgetUnowned(name, plan.paths(), previous)
		return err
	}
	if err := atomicfile.Remove(e.journalFile()); err != nil {
		return err
	}
	for _, path := range dropped {
		if err := e.originals.restored(path); err != nil {
			return err
		}
	}
	return nil
}

// swap replaces the files, then validates, then reloads.
func (e *Engine) swap(ctx context.Context, spec wire.FilesSpec, todo []snapshot) error {
	for _, want := range todo {
		created, err := write(want)
		if len(created) > 0 {
			err = errors.Join(err, e.originals.created(want.Path, created))
		}
		if err != nil {
			return err
		}
	}
	if err := e.command(ctx, "validate", spec.Validate); err != nil {
		return err
	}
	return e.command(ctx, "reload", spec.Reload)
}

// command runs a validate or reload command; none is fine.
func (e *Engine) command(ctx context.Context, what string, command []string) error {
	if len(command) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	out, err := e.cfg.Run(ctx, command, maxCommandOutput)
	switch {
	case err != nil:
		return fmt.Errorf("%s command %s: %w", what, command[0], err)
	case ctx.Err() != nil:
		return fmt.Errorf("%s command %s did not end within %v", what, command[0], commandTimeout)
	case out.Exit.Code != 0:
		return fmt.Errorf("%s command %s failed with exit status %d: %s", what, command[0], out.Exit.Code, lastLine(out))
	}
	return nil
}

// removeFiles puts back what a policy replaced, as far as no other policy owns
// it now, and reloads.
func (e *Engine) removeFiles(ctx context.Context, name string, paths []string, reload []string) error {
	if err := e.finish(ctx); err != nil {
		return err
	}
	changed := false
	for _, path := range paths {
		if e.ownedByOther(path, name) {
			continue
		}
		original, ok := e.originals.get(path)
		if !ok {
			continue
		}
		if _, err := write(original); err != nil {
			return fmt.Errorf("restore %s: %w", path, err)
		}
		if err := e.originals.restored(path); err != nil {
			return err
		}
		changed = true
	}
	if !changed {
		return nil
	}
	return e.command(ctx, "reload", reload)
}

// forgetUnowned drops what was saved for paths that a failed policy never got.
func (e *Engine) forgetUnowned(name string, paths, previous []string) {
	for _, path := range paths {
		if !slices.Contains(previous, path) && !e.ownedByOther(path, name) {
			if err := e.originals.restored(path); err != nil {
				e.cfg.Log.Warn("forget a saved file", "path", path, "error", err)
			}
		}
	}
}

func lastLine(out Output) string {
	text := firstOf(lastText(out.Stderr), lastText(out.Stdout), "no output")
	return wire.Quotable(text)
}

// Output is what a command of a policy said.
type Output struct {
	Exit   proc.Exit
	Stdout string
	Stderr string
}
