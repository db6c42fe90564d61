// Command sallyport-node is the agent and nothing else: a monitored host
// carries no database server, no certificate authority and no operator's tool.
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
	"sallyport/node"
)

func main() {
	streams := cli.Standard()
	os.Exit(cli.Main(newRoot(streams), streams, os.Args[1:]))
}

func newRoot(streams cli.IO) *cobra.Command {
	return cli.SlimRoot(wire.RoleNode, "The agent: keeps desired state applied, runs allowed actions, keeps events safe", streams, func() (cli.Role, error) {
		c, err := config.LoadNode(streams.Env)
		if err != nil {
			return cli.Role{}, err
		}
		return cli.NewRole(string(wire.RoleNode), c.Common, streams, func(log *slog.Logger, reg *prometheus.Registry) (func(context.Context) error, error) {
			n, err := node.New(node.Config{Node: c, Version: cli.BuildVersion(), Stdin: streams.In}, log, reg)
			if err != nil {
				return nil, err
			}
			return n.Run, nil
		})
	})
}
