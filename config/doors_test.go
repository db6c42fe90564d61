package config

import (
	"errors"
	"strings"
	"testing"
)

func TestDoors(t *testing.T) {
	c, err := LoadGateway([]string{"HOME=/root", "SALLYPORT_DATA=/d", "SALLYPORT_GATEWAY_DOORS=est; acme;est", "SALLYPORT_GATEWAY_DOORS_ALLOW=*.Plant.example@site=plant,env in (a,b);b.example", "SALLYPORT_GATEWAY_DOORS_URL=http://pki.example:80/"})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(c.Doors, " ") != "est acme" || c.Doors.Has(DoorStatus) || c.DoorsURL != "http://pki.example:80" || c.DoorsName != "doors.sallyport" {
		t.Errorf("%v %v %v", c.Doors, c.DoorsURL, c.DoorsName)
	}
	if len(c.DoorsAllow) != 2 || c.DoorsAllow[0] != (NameRule{"*.plant.example", "site=plant,env in (a,b)"}) || c.DoorsAllow[1] != (NameRule{"b.example", ""}) {
		t.Errorf("%+v", c.DoorsAllow)
	}
	for bad, variable := range map[string]string{
		"SALLYPORT_GATEWAY_DOORS=scep":                                                               "DOORS",
		"SALLYPORT_GATEWAY_DOORS=acme":                                                               "DOORS_ALLOW",
		"SALLYPORT_GATEWAY_DOORS_ALLOW=[":                                                            "DOORS_ALLOW",
		"SALLYPORT_GATEWAY_DOORS_ALLOW=a@":                                                           "DOORS_ALLOW",
		"SALLYPORT_GATEWAY_DOORS_ALLOW=@site=x":                                                      "DOORS_ALLOW",
		"SALLYPORT_GATEWAY_DOORS_URL=pki.example":                                                    "DOORS_URL",
		"SALLYPORT_GATEWAY_DOORS_URL=http://u:p@x":                                                   "DOORS_URL",
		"SALLYPORT_GATEWAY_DOORS_NAME=doors":                                                         "DOORS_NAME",
		"SALLYPORT_GATEWAY_DOORS_LISTEN=:80":                                                         "DOORS_LISTEN",
		"SALLYPORT_GATEWAY_DOORS=est\nSALLYPORT_GATEWAY_ACCEPT=doors.sallyport=127.0.0.1:1":          "DOORS_NAME",
		"SALLYPORT_GATEWAY_DOORS=est\nSALLYPORT_GATEWAY_DOORS_LISTEN=:80":                            "DOORS_LISTEN",
		"SALLYPORT_GATEWAY_DOORS=status\nSALLYPORT_GATEWAY_DOORS_LISTEN=nowhere":                     "DOORS_LISTEN",
		"SALLYPORT_GATEWAY_DOORS=acme\nSALLYPORT_GATEWAY_DOORS_ALLOW=none\nSALLYPORT_LOG_LEVEL=info": "DOORS_ALLOW",
	} {
		_, err := LoadGateway(append([]string{"HOME=/root", "SALLYPORT_DATA=/d"}, strings.Split(bad, "\n")...))
		if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "SALLYPORT_GATEWAY_"+variable) {
			t.Errorf("%q: %v, want it to name %s", bad, err, variable)
		}
	}
}
