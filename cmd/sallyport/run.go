package main

import (
	"context"
	"log/slog"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/cli"
	"sallyport/node"
	"sallyport/rcp"
)

// runnable are the roles in the order in which they start: what others depend
// on comes first.
var runnable = []string{"signer", "pki", "gateway", "rcp", "node"}

const nameRun = "run"

func (a *app) runCommand() *cobra.Command {
	return &cobra.Command{
		Use:   nameRun + " ROLE...",
		Short: "Run one or several roles until a signal: " + strings.Join(runnable, ", "),
		Long: "Run one or several roles in one process, until SIGINT or SIGTERM. The environment configures them:\n" +
			"`sallyport config check` says what it makes of them, `sallyport config reference` lists all variables.\n" +
			"The gateway holds the certificate authority unless SALLYPORT_GATEWAY_PKI names one in a process of its own\n" +
			"(`run pki`): without it `run gateway pki` is the same as `run gateway`.",
		ValidArgs: runnable,
		Args:      cli.AtLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			roles, err := a.roles(args)
			if err != nil {
				return err
			}
			return cli.RunRoles(cmd.Context(), roles...)
		},
	}
}

// roles reads the configuration of each role before the first one starts.
func (a *app) roles(names []string) ([]cli.Role, error) {
	builders := map[string]func() (cli.Role, error){"signer": a.signerRole, "pki": a.pkiRole, "gateway": a.gatewayRole, "rcp": a.rcpRole, "node": a.nodeRole}
	for _, name := range names {
		if builders[name] == nil {
			return nil, cli.Usage("unknown role %q; there are %s", name, strings.Join(runnable, ", "))
		}
	}
	if slices.Contains(names, "gateway") {
		c, err := config.LoadGateway(a.streams.Env)
		if err != nil {
			return nil, err
		}
		if c.PKI == "" { // the gateway is the authority's process
			names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == "pki" })
		}
	}
	var roles []cli.Role
	for _, name := range runnable {
		if !slices.Contains(names, name) {
			continue
		}
		r, err := builders[name]()
		if err != nil {
			return nil, err
		}
		roles = append(roles, r)
	}
	return roles, nil
}

func (a *app) rcpRole() (cli.Role, error) {
	c, err := config.LoadRCP(a.streams.Env)
	if err != nil {
		return cli.Role{}, err
	}
	return cli.NewRole("rcp", c.Common, a.streams, func(log *slog.Logger, reg *prometheus.Registry) (func(context.Context) error, error) {
		r, err := rcp.New(rcp.Config{RCP: c, Version: cli.BuildVersion(), Stdin: a.streams.In}, log, reg)
		if err != nil {
			return nil, err
		}
		return r.Run, nil
	})
}

func (a *app) nodeRole() (cli.Role, error) {
	c, err := config.LoadNode(a.streams.Env)
	if err != nil {
		return cli.Role{}, err
	}
	return cli.NewRole("node", c.Common, a.streams, func(log *slog.Logger, reg *prometheus.Registry) (func(context.Context) error, error) {
		n, err := node.New(node.Config{Node: c, Version: cli.BuildVersion(), Stdin: a.streams.In}, log, reg)
		if err != nil {
			return nil, err
		}
		return n.Run, nil
	})
}
