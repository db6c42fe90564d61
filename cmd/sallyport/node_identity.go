package main

import (
	"context"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) nodeRenewCommand() *cobra.Command {
	var rekey bool
	cmd := &cobra.Command{Use: "renew NAME [--rekey]", Short: "Renew a node's certificate now", Args: cli.Exactly(1), ValidArgsFunction: a.nodeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return tell(cmd.Context(), a, a.printNode, func(ctx context.Context, c *api.Client) (api.NodeDetail, error) {
				return c.RenewNode(ctx, args[0], rekey)
			})
		}}
	cmd.Flags().BoolVar(&rekey, "rekey", false, "with a new key, which the node makes; the old one is revoked")
	return cmd
}

func (a *app) nodeReidentifyCommand() *cobra.Command {
	var in api.Reidentify
	cmd := &cobra.Command{Use: "reidentify NAME [--as NEW] [--boot ID]", Short: "Give the machine that answers as a node another identity", Args: cli.Exactly(1), ValidArgsFunction: a.nodeNames(1),
		Long: `Give the machine that answers as a node another UUID and another key.

Without --as the node keeps its name, tags and history, and the old identity is
revoked, wherever else it lives. With --as the machine becomes a node of that
name beside the old one: the way out when a disk image or a virtual machine was
cloned with its identity. A node whose key was on another machine should get a
new one then: node renew --rekey.

The node must be connected. It makes the new key itself; its events, policies
and local configuration stay.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if in.Name != "" {
				if err := config.CheckName(in.Name); err != nil {
					return cli.Usage("--as: %w", err)
				}
			}
			return tell(cmd.Context(), a, a.printNode, func(ctx context.Context, c *api.Client) (api.NodeDetail, error) {
				return c.ReidentifyNode(ctx, args[0], in)
			})
		}}
	cmd.Flags().StringVar(&in.Name, "as", "", "name of the node that the machine becomes, beside the old one")
	cmd.Flags().StringVar(&in.Boot, "boot", "", "boot ID of the one machine that is meant, where two have one identity: node show lists them, local status says which host has which; it is asked by all ways, for 30 s")
	return cmd
}
