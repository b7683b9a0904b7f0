package hw

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"unsafe"

	"github.com/anatol/smart.go"
	"golang.org/x/sys/unix"
)

// Commands to an ATA disk go through the kernel's SCSI layer as ATA PASS-THROUGH
// (16) (SAT-3, 12.2.2.3), to which the kernel itself answers for a SATA disk, and the
// bridge for one behind USB. The library does this too, but only for disks whose
// SCSI name is "ATA", which most bridges replace by their own; and it has no
// RETURN STATUS.
const (
	ataPassThrough16  = 0x85
	ataNonData        = 3 << 1 // protocol field
	ataPIOIn          = 4 << 1
	ataCheckCondition = 1 << 5 // return the registers as sense data
	ataOneSector      = 0x0e   // from the disk, in blocks, as many as the count register says

	ataCheckPowerMode       = 0xe5 // ACS-3, 7.2
	ataSMART                = 0xb0 // its feature register, ACS-3, 7.46:
	smartReadData           = 0xd0
	smartReadThresholds     = 0xd1 // ATA-5; obsolete, and in every disk
	smartReturnStatus       = 0xda
	smartMid, smartHigh     = 0x4f, 0xc2 // LBA registers of each SMART command, and of RETURN STATUS if all is well
	smartMidBad, smartHiBad = 0xf4, 0x2c // of RETURN STATUS if a threshold is passed

	sgIO            = 0x2285   // <scsi/sg.h>
	maxSense        = 32       // bytes
	senseDescriptor = 0x72     // current error, descriptor format
	senseFixed      = 0x70     // current error, fixed format
	passThroughInfo = 0x1d     // additional sense qualifier: ATA PASS-THROUGH INFORMATION AVAILABLE
	ataStatusReturn = 0x09     // descriptor type
	ataReady        = 1 << 6   // status register: DRDY
	ataFailed       = 0b100001 // status register: ERR or DF

	// How long the kernel waits before it gives up on a command, in milliseconds,
	// and begins to reset things. We ourselves wait much less long: see within.
	sgTimeout = 10_000
)

// sgHeader is sg_io_hdr of <scsi/sg.h>.
type sgHeader struct {
	interfaceID  int32
	direction    int32
	cmdLen       uint8
	senseLen     uint8
	iovecCount   uint16
	transferLen  uint32
	transfer     unsafe.Pointer
	cmd          unsafe.Pointer
	sense        unsafe.Pointer
	timeout      uint32
	flags        uint32
	packID       int32
	_            unsafe.Pointer
	status       uint8
	maskedStatus uint8
	msgStatus    uint8
	senseWritten uint8
	hostStatus   uint16
	driverStatus uint16
	residual     int32
	duration     uint32
	info         uint32
}

var (
	errNoRegisters = errors.New("it did not answer an ATA command as the standard says")
	errSMART       = errors.New("it does not have SMART, or it is switched off")
)

// ataDisk is one disk that takes ATA commands.
type ataDisk struct {
	node string
	fd   int
}

func openATA(node string) (*ataDisk, error) {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", node, err)
	}
	return &ataDisk{node, fd}, nil
}

func (d *ataDisk) close() { unix.Close(d.fd) }

// send sends one command. With data it reads a sector into it, without it
// returns the sense data that hold the registers.
func (d *ataDisk) send(cmd [16]byte, data []byte) ([]byte, error) {
	var sense [maxSense]byte
	h := sgHeader{
		interfaceID: 'S', direction: -1, // SG_DXFER_NONE
		cmdLen: uint8(len(cmd)), cmd: unsafe.Pointer(&cmd[0]),
		senseLen: uint8(len(sense)), sense: unsafe.Pointer(&sense[0]),
		timeout: sgTimeout,
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&cmd[0])
	pin.Pin(&sense[0])
	if len(data) > 0 {
		h.direction = -3 // SG_DXFER_FROM_DEV
		h.transferLen, h.transfer = uint32(len(data)), unsafe.Pointer(&data[0])
		pin.Pin(&data[0])
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.fd), sgIO, uintptr(unsafe.Pointer(&h))); errno != 0 {
		return nil, fmt.Errorf("ask %s: %w", d.node, errno)
	}
	if len(data) > 0 && (h.status != 0 || h.hostStatus != 0 || h.residual != 0) {
		return nil, errSMART
	}
	return sense[:min(int(h.senseWritten), len(sense))], nil
}

// spinning asks whether the platters turn, which is defined not to change that.
func (d *ataDisk) spinning() (bool, error) {
	sense, err := d.send([16]byte{0: ataPassThrough16, 1: ataNonData, 2: ataCheckCondition, 14: ataCheckPowerMode}, nil)
	if err != nil {
		return false, err
	}
	return spinningFromSense(sense)
}

// passed asks for the disk's own verdict on itself.
func (d *ataDisk) passed() (bool, error) {
	sense, err := d.send([16]byte{0: ataPassThrough16, 1: ataNonData, 2: ataCheckCondition, 4: smartReturnStatus, 10: smartMid, 12: smartHigh, 14: ataSMART}, nil)
	if err != nil {
		return false, err
	}
	return passedFromSense(sense)
}

func (d *ataDisk) sector(feature byte) ([]byte, error) {
	buf := make([]byte, 512)
	_, err := d.send([16]byte{0: ataPassThrough16, 1: ataPIOIn, 2: ataOneSector, 4: feature, 6: 1, 10: smartMid, 12: smartHigh, 14: ataSMART}, buf)
	return buf, err
}

// registers are those of an ATA disk after a command.
type registers struct{ status, count, lbaMid, lbaHigh byte }

// registersFromSense finds the registers in sense data, which is either in
// descriptor format (Linux since 2.6) or in fixed format (Linux since 6.11, if
// the disk is set so; some bridges). Anything else is an error.
func registersFromSense(s []byte) (registers, error) {
	var r registers
	switch {
	case len(s) >= 22 && s[0]&0x7f == senseDescriptor && s[2] == 0 && s[3] == passThroughInfo &&
		s[8] == ataStatusReturn && s[9] >= 12:
		r = registers{status: s[21], count: s[13], lbaMid: s[17], lbaHigh: s[19]}
	case len(s) >= 14 && s[0]&0x7f == senseFixed && s[12] == 0 && s[13] == passThroughInfo:
		r = registers{status: s[4], count: s[6], lbaMid: s[10], lbaHigh: s[11]}
	default:
		return registers{}, errNoRegisters
	}
	if r.status&ataReady == 0 || r.status&ataFailed != 0 {
		return registers{}, errNoRegisters
	}
	return r, nil
}

// spinningFromSense takes a disk for spinning only if it said so.
func spinningFromSense(s []byte) (bool, error) {
	r, err := registersFromSense(s)
	if err != nil {
		return false, err
	}
	switch r.count {
	case 0xff, 0x80, 0x81, 0x82, 0x83: // active or idle, idle, idle_a to idle_c
		return true, nil
	case 0x00, 0x01: // standby_z, standby_y
		return false, nil
	}
	return false, fmt.Errorf("it answered CHECK POWER MODE with %#02x", r.count)
}

// passedFromSense reads the answer to RETURN STATUS (ACS-3, 7.46.10).
func passedFromSense(s []byte) (bool, error) {
	r, err := registersFromSense(s)
	switch {
	case err != nil:
		return false, err
	case r.lbaMid == smartMid && r.lbaHigh == smartHigh:
		return true, nil
	case r.lbaMid == smartMidBad && r.lbaHigh == smartHiBad:
		return false, nil
	}
	return false, errNoRegisters
}

// ataPages is what an ATA disk says about itself: what is kept of it in a recorded machine.
type ataPages struct {
	Attributes []smart.AtaSmartAttr `json:"attributes"` // names and raw formats are from the library's drive database
	Thresholds map[uint8]uint8      `json:"thresholds,omitempty"`
	Passed     *bool                `json:"passed,omitempty"` // RETURN STATUS
}

// readATA asks an awake SATA disk through the library, one behind a bridge by itself.
func readATA(node string, bridged bool) (*ataPages, error) {
	d, err := openATA(node)
	if err != nil {
		return nil, err
	}
	defer d.close()
	read := readByLibrary
	if bridged {
		read = func(string) (*ataPages, error) { return d.read() }
	}
	pages, err := read(node)
	if err != nil {
		return nil, err
	}
	// A disk without a verdict still has attributes.
	if ok, err := d.passed(); err == nil {
		pages.Passed = &ok
	}
	return pages, nil
}

func readByLibrary(node string) (*ataPages, error) {
	dev, err := smart.OpenSata(node)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	page, err := dev.ReadSMARTData()
	if err != nil {
		return nil, err
	}
	pages := &ataPages{}
	for _, id := range slices.Sorted(maps.Keys(page.Attrs)) {
		pages.Attributes = append(pages.Attributes, page.Attrs[id])
	}
	if t, err := dev.ReadSMARTThresholds(); err == nil { // obsolete since ATA-6: some disks have none
		pages.Thresholds = t.Thresholds
	}
	return pages, nil
}

func (d *ataDisk) read() (*ataPages, error) {
	data, err := d.sector(smartReadData)
	if err != nil {
		return nil, err
	}
	thresholds, err := d.sector(smartReadThresholds)
	if err != nil {
		thresholds = nil
	}
	return decodeATA(data, thresholds)
}

// decodeATA takes the two sectors apart with the library's structures. Without
// the drive database, attributes get only the format on which all vendors agree.
func decodeATA(data, thresholds []byte) (*ataPages, error) {
	var raw smart.AtaSmartPageRaw
	if len(data) != 512 || sumOf(data) != 0 {
		return nil, errors.New("its SMART data are damaged: they do not match their checksum")
	}
	if err := binary.Read(bytes.NewReader(data), binary.LittleEndian, &raw); err != nil {
		return nil, fmt.Errorf("its SMART data: %w", err)
	}
	pages := &ataPages{}
	for _, a := range raw.Attrs {
		if a.Id == 0 {
			continue
		}
		v := smart.AtaSmartAttr{Id: a.Id, Flags: a.Flags, Current: a.Current, Worst: a.Worst, VendorBytes: a.VendorBytes, Type: smart.AtaDeviceAttributeTypeRaw48}
		if a.Id == 194 || a.Id == 190 {
			v.Type = smart.AtaDeviceAttributeTypeTempMinMax
		}
		for i, b := range a.VendorBytes {
			v.ValueRaw |= uint64(b) << (8 * i)
		}
		pages.Attributes = append(pages.Attributes, v)
	}
	var limits smart.AtaSmartThresholdsPageRaw
	if len(thresholds) == 512 && sumOf(thresholds) == 0 && binary.Read(bytes.NewReader(thresholds), binary.LittleEndian, &limits) == nil {
		pages.Thresholds = map[uint8]uint8{}
		for _, e := range limits.ThresholdEntries {
			if e.Id != 0 {
				pages.Thresholds[e.Id] = e.Threshold
			}
		}
	}
	return pages, nil
}

// sumOf is 0 for a sector with the right checksum in its last byte.
func sumOf(sector []byte) (sum byte) {
	for _, b := range sector {
		sum += b
	}
	return sum
}
