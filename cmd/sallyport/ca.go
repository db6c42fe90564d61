package main

import (
	"github.com/spf13/cobra"

	"sallyport/internal/cli"
)

func (a *app) caCommand() *cobra.Command {
	return cli.Group("ca", "The certificate authority", append(a.caRolloverCommands(), a.caCSRCommand(), a.caImportCommand(), a.caPinCommand(), a.caGatewayCommand(), a.caPassphraseCommand())...)
}
