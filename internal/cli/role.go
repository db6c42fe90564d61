package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyport/config"
	"sallyport/internal/admin"
	"sallyport/internal/wire"
)

// Role is one role that is ready to run: its configuration was read, and
// nothing was opened yet.
type Role struct {
	Name string
	Run  func(ctx context.Context) error // returns when all that it started has ended
}

// NewRole reads nothing and opens nothing: it gives a role its logger (several
// roles may share one process, and "role" is what messages say of peers) and its
// own registry of metrics, and build makes the value whose Run blocks.
func NewRole(name string, c config.Common, streams IO, build func(*slog.Logger, *prometheus.Registry) (func(context.Context) error, error)) (Role, error) {
	log := NewLogger(streams.Err, c).With("component", name)
	run, err := build(log, admin.NewRegistry(BuildVersion()))
	return Role{Name: name, Run: run}, err
}

// errRoleEnded stops the other roles when one has ended without an error.
var errRoleEnded = errors.New("a role ended")

// RunRoles runs roles in one process until ctx ends or one of them fails. A
// signal is the ordinary end, and no error.
func RunRoles(ctx context.Context, roles ...Role) error {
	g, inner := errgroup.WithContext(ctx)
	for _, r := range roles {
		g.Go(func() error {
			err := r.Run(inner)
			if err == nil && ctx.Err() == nil {
				err = errRoleEnded
			}
			if err != nil && ctx.Err() != nil && errors.Is(err, context.Cause(ctx)) {
				err = nil
			}
			return err
		})
	}
	err := g.Wait()
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: free some space where SALLYPORT_DATA is, then start again", err)
	}
	return err
}

// SlimRoot is a program that is one role: without a command it runs the role,
// which load makes of the environment.
func SlimRoot(role wire.Role, short string, streams IO, load func() (Role, error)) *cobra.Command {
	root := Root("sallyport-"+string(role), short, short+".\n\nWithout a command it runs until a signal.", streams)
	unknown := root.RunE
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknown(cmd, args)
		}
		r, err := load()
		if err != nil {
			return err
		}
		return RunRoles(cmd.Context(), r)
	}
	out := NewOutput(streams)
	out.AddFlag(root)
	root.AddCommand(LocalCommand(out, streams, nil, role), ConfigCommand(out, streams, string(role)), VersionCommand(out))
	return root
}
