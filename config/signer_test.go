package config_test

import (
	"errors"
	"slices"
	"testing"

	"sallyport/config"
)

func TestSigner(t *testing.T) {
	dir := t.TempDir()
	c, err := config.LoadSigner([]string{"SALLYPORT_DATA=" + dir, "SALLYPORT_SIGNER_USERS=root; 4711"})
	if err != nil || !slices.Equal(c.Users, config.Users{0, 4711}) || c.Listen != dir+"/signer/signer.sock" {
		t.Errorf("%+v, %v", c, err)
	}
	if text, err := c.Users.MarshalText(); string(text) != "0;4711" || err != nil {
		t.Errorf("%s, %v", text, err)
	}
	for _, line := range []string{"SALLYPORT_SIGNER_USERS=nobody-of-this-name", "SALLYPORT_SIGNER_USERS=-1", "SALLYPORT_SIGNER_LISTEN=127.0.0.1:1", "SALLYPORT_SIGNER_LISTEN=relative.sock", "SALLYPORT_SIGNER_TPM=tpmrm0"} {
		if _, err := config.LoadSigner([]string{"SALLYPORT_DATA=" + dir, line}); !errors.Is(err, config.ErrConfig) {
			t.Errorf("%s: %v", line, err)
		}
	}
	for _, line := range []string{"SALLYPORT_PKI_SIGNER=127.0.0.1:1", "SALLYPORT_PKI_LISTEN=nowhere"} {
		if _, err := config.LoadPKI([]string{"SALLYPORT_DATA=" + dir, line}); !errors.Is(err, config.ErrConfig) {
			t.Errorf("%s: %v", line, err)
		}
	}
}
