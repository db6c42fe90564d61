package main

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) certificateCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List the certificates that other programs have from the doors", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return tell(cmd.Context(), a, listed(a, certificateTable), func(ctx context.Context, c *api.Client) ([]api.Certificate, error) { return c.Certificates(ctx) })
		}}
	reasons := slices.Sorted(maps.Keys(api.RevocationReasons))
	var in api.RevokeCertificate
	revoke := &cobra.Command{Use: "revoke SERIAL [--reason R]", Short: "Revoke a certificate of another program: CRL and OCSP say so at once", Args: cli.Exactly(1),
		Long: "Revoke a certificate of another program, by its serial number or at least 8 digits of it.\n" +
			"Certificates of nodes and RCPs are revoked with them: `sallyport node revoke`, `sallyport rcp remove`.",
		ValidArgsFunction: a.completeNames(1, namesOf((*api.Client).Certificates, func(c api.Certificate) string { return c.Serial })),
		RunE: func(cmd *cobra.Command, args []string) error {
			if in.Reason != "" && !slices.Contains(reasons, in.Reason) {
				return cli.Usage("--reason %q: want one of %s", in.Reason, strings.Join(reasons, ", "))
			}
			return tell(cmd.Context(), a, printed(a, certificateTable), func(ctx context.Context, c *api.Client) (api.Certificate, error) {
				return c.RevokeCertificate(ctx, args[0], in)
			})
		}}
	revoke.Flags().StringVar(&in.Reason, "reason", "", "why: "+strings.Join(reasons, ", "))
	_ = revoke.RegisterFlagCompletionFunc("reason", fixed(reasons...))
	return cli.Group("certificate", "Certificates of other programs, from the ACME and EST doors", list, revoke)
}

func certificateTable(all ...api.Certificate) cli.Table {
	t := cli.Table{Columns: []string{"serial", "names", "door", "via", "state", "issued", "expires", "revoked", "reason"}}
	for _, c := range all {
		t.Add(c.Serial, strings.Join(c.Names, ","), c.Door, c.Via, c.State, cli.Time(c.Issued), cli.Time(c.Expires), cli.Time(deref(c.Revoked)), c.Reason)
	}
	return t
}
