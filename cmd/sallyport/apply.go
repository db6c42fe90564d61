package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

// maxManifest bounds one file: the API refuses more anyway.
const maxManifest = 8 << 20

func (a *app) applyCommand() *cobra.Command {
	return a.applyVerb("apply -f FILE|-", "Create and change policies and deployments together", "")
}

// applyVerb is `apply`, for all documents or those of one kind.
func (a *app) applyVerb(use, short, kind string) *cobra.Command {
	var files []string
	var in api.Apply
	var wait cli.DurationFlag
	cmd := &cobra.Command{
		Use: use + " [--dry-run] [--wait D]", Short: short, Args: cli.Exactly(0),
		Long: short + ": all documents of all files, or none.\n" +
			"--dry-run computes the same and changes nothing. --wait returns when every connected node has answered:\n" +
			"0 when all applied it, 1 when one failed, 5 when the time was up.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return cli.Usage("-f: name a file, or - for standard input")
			}
			in.Kind = kind
			var err error
			if in.Manifests, err = a.readManifests(files); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			applied, err := c.Apply(cmd.Context(), in)
			if err != nil {
				return err
			}
			if err := a.printApplied(applied); err != nil {
				return err
			}
			if wait.Duration == 0 || in.DryRun {
				return nil
			}
			return a.waitApplied(cmd.Context(), c, applied, wait.Std())
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&files, "file", "f", nil, "YAML documents; - is standard input")
	f.BoolVar(&in.DryRun, "dry-run", false, "say what would change, and change nothing")
	f.Var(&wait, "wait", "wait so long for the nodes")
	return cmd
}

func (a *app) readManifests(files []string) ([]api.Manifest, error) {
	var out []api.Manifest
	for _, name := range files {
		m, err := a.readManifest(name)
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

func (a *app) readManifest(name string) (api.Manifest, error) {
	in, shown := a.streams.In, "standard input"
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return api.Manifest{}, err
		}
		defer func() { _ = f.Close() }()
		in, shown = f, name
	}
	b, err := io.ReadAll(io.LimitReader(in, maxManifest+1))
	if err != nil {
		return api.Manifest{}, fmt.Errorf("read %s: %w", shown, err)
	}
	if len(b) > maxManifest {
		return api.Manifest{}, cli.Usage("%s is larger than %d bytes", shown, maxManifest)
	}
	return api.Manifest{File: shown, Text: string(b)}, nil
}

func (a *app) printApplied(r api.Applied) error {
	t := cli.Table{Columns: []string{"kind", "name", "change", "version"}}
	for _, o := range r.Objects {
		t.Add(o.Kind, o.Name, o.Change, fmt.Sprint(o.Version))
	}
	if err := a.out.Print(r, t); err != nil {
		return err
	}
	if a.out.Format != cli.FormatTable {
		return nil
	}
	if r.DryRun {
		for _, n := range r.Nodes {
			var parts []string
			for _, p := range []struct {
				verb  string
				names []string
			}{{"add", n.Add}, {"change", n.Change}, {"remove", n.Remove}} {
				if len(p.names) > 0 {
					parts = append(parts, p.verb+" "+strings.Join(p.names, ", "))
				}
			}
			offline := ""
			if !n.Online {
				offline = " (offline)"
			}
			a.out.Say("node %s%s: %s", n.Node, offline, strings.Join(parts, "; "))
		}
	}
	for _, c := range r.Conflicts {
		a.out.Say("conflict: %s", cli.Clean(c))
	}
	a.out.Say("%s", r.Summary)
	return nil
}

// waitApplied waits for the deployments that the change touches.
func (a *app) waitApplied(ctx context.Context, c *api.Client, applied api.Applied, limit time.Duration) error {
	touched := map[string]bool{}
	policies := map[string]bool{}
	for _, o := range applied.Objects {
		switch o.Kind {
		case "deployment":
			touched[o.Name] = true
		case "policy":
			policies[o.Name] = true
		}
	}
	all, err := c.Deployments(ctx)
	if err != nil {
		return err
	}
	var names []string
	for _, d := range all {
		hit := touched[d.Name]
		for _, p := range d.Policies {
			hit = hit || policies[p]
		}
		if hit {
			names = append(names, d.Name)
		}
	}
	_, err = a.waitDeployments(ctx, c, names, limit)
	return err
}

// pollEvery is short beside what a person notices, and long beside a call on a
// unix socket.
const pollEvery = 100 * time.Millisecond

// waitDeployments returns the last status of each when no connected node is
// still to answer. Nodes that are offline get it when they come back, and are
// not waited for.
func (a *app) waitDeployments(ctx context.Context, c *api.Client, names []string, limit time.Duration) ([]api.DeploymentStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	bar := cli.NewProgress(a.streams, "nodes", 1)
	defer bar.Done()
	var last []api.DeploymentStatus
	for {
		var sum api.DeploymentCounts
		fresh := make([]api.DeploymentStatus, 0, len(names))
		for _, name := range names {
			s, err := c.DeploymentStatus(ctx, name)
			if err != nil {
				return last, waitError(ctx, sum, limit, err)
			}
			fresh = append(fresh, s)
			sum.Applied += s.Counts.Applied
			sum.Pending += s.Counts.Pending
			sum.Failed += s.Counts.Failed
			sum.Offline += s.Counts.Offline
		}
		last = fresh
		bar.Set(sum.Applied+sum.Failed, max(1, sum.Applied+sum.Failed+sum.Pending))
		if sum.Pending == 0 {
			if sum.Failed > 0 {
				return last, cli.Fail(cli.ExitFailed, "%d nodes failed, %d applied, %d offline; `sallyport deployment status %s --failed` says why", sum.Failed, sum.Applied, sum.Offline, names[0])
			}
			return last, nil
		}
		select {
		case <-ctx.Done():
			return last, waitError(ctx, sum, limit, ctx.Err())
		case <-tick.C:
		}
	}
}

func waitError(ctx context.Context, sum api.DeploymentCounts, limit time.Duration, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return cli.Fail(cli.ExitTimeout, "after %s: %d nodes applied, %d pending, %d failed, %d offline", limit, sum.Applied, sum.Pending, sum.Failed, sum.Offline)
	}
	return err
}
