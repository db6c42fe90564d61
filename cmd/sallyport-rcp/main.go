// Command sallyport-rcp is an RCP and nothing else: the exposed box carries no
// database, no certificate authority and no operator's tool.
package main

import (
	"context"
	"log/slog"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
	"sallyport/rcp"
)

func main() {
	streams := cli.Standard()
	os.Exit(cli.Main(newRoot(streams), streams, os.Args[1:]))
}

func newRoot(streams cli.IO) *cobra.Command {
	return cli.SlimRoot(wire.RoleRCP, "An RCP: joins channels of gateways and nodes, and reads nothing", streams, func() (cli.Role, error) {
		c, err := config.LoadRCP(streams.Env)
		if err != nil {
			return cli.Role{}, err
		}
		return cli.NewRole(string(wire.RoleRCP), c.Common, streams, func(log *slog.Logger, reg *prometheus.Registry) (func(context.Context) error, error) {
			r, err := rcp.New(rcp.Config{RCP: c, Version: cli.BuildVersion(), Stdin: streams.In}, log, reg)
			if err != nil {
				return nil, err
			}
			return r.Run, nil
		})
	})
}
