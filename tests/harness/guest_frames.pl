# Runs in a guest of the image that `guest_image.py` makes: sends, counts and answers raw Ethernet frames. Uses no module of Perl.
#
#   nics                             MAC=NAME of each NIC
#   watch                            counts, from now on, frames that carry a number, on all NICs, in promiscuous mode
#   counts FIRST LAST                NUMBER/NIC=COUNT of those numbers that were received
#   send NIC FIRST COUNT HEX...      sends each frame COUNT times; the frames get the numbers from FIRST on
#   flood NIC NUMBER HEX             sends the frame as fast as possible until `stop`, which reports how often
#   mailbox NIC WORD...              sends a request to the PF by the mailbox of an 82576 VF; reports the first word of its answer
#   echo NIC                         answers `trips` and `rate` of another guest from now on
#   trips NIC TARGET COUNT           frames there and back, one after the other
#   rate NIC TARGET SIZE BATCHES     frames of this size in one direction; the receiver acknowledges each batch
#
# NIC and TARGET are MAC addresses. The answer is a line of the protocol of guest-images/minimal/init.

$| = 1;
my ($AF_PACKET, $SOCK_RAW, $ALL, $OWN) = (17, 3, 0x0003, 0x88B5);
my ($SOL_SOCKET, $SO_RCVBUFFORCE, $SOL_PACKET, $ADD_MEMBERSHIP, $PROMISC, $OUTGOING) = (1, 33, 263, 1, 1, 4);
my ($COUNTS, $STOP, $SENT, $BATCH, $WAIT) = ('/counts', '/stop', '/sent', 32, 1.0);

sub fail { print "nohype: error frames @_\n"; exit 1 }
sub reply { print join(' ', 'nohype: done frames', @_), "\n"; exit 0 }

sub content {
    open(my $file, '<', $_[0]) or return '';
    my $line = <$file>;
    chomp $line;
    return $line;
}

# By MAC address: name and index.
my %nics;
opendir(my $folder, '/sys/class/net') or fail('/sys/class/net');
for my $name (grep { !/^\.|^lo$/ } readdir $folder) {
    my $path = "/sys/class/net/$name";
    $nics{content("$path/address")} = {name => $name, index => content("$path/ifindex"), device => readlink("$path/device")};
}

sub nic { return $nics{$_[0]} || fail("no NIC $_[0]") }

# A packet socket of one NIC, or of all (index 0).
sub listening {
    my ($index, $protocol) = @_;
    socket(my $socket, $AF_PACKET, $SOCK_RAW, unpack('S', pack('n', $protocol))) or fail("socket: $!");
    setsockopt($socket, $SOL_SOCKET, $SO_RCVBUFFORCE, pack('i', 8 << 20));
    if ($index) {
        bind($socket, pack('S n i S C C a8', $AF_PACKET, $protocol, $index, 0, 0, 0, '')) or fail("bind: $!");
    }
    return $socket;
}

sub sender {
    my ($mac, $protocol) = @_;
    return listening(nic($mac)->{index}, $protocol // $OWN);
}

sub bytes { (my $hex = $_[0]) =~ tr/://d; return pack('H*', $hex) }

# With its number at the end, as `attack_frames.finish()`.
sub finish { my ($frame, $number) = @_; return $frame . "\0" x (72 - length $frame) . 'ATCK' . pack('N', $number) }

sub now { my $time = "\0" x 16; syscall(228, 1, $time); my ($s, $n) = unpack('qq', $time); return $s + $n / 1e9 }

# Ends this process in the parent, with the answer; goes on in the child, which the console does not wait for.
sub in_background {
    my @answer = @_;
    defined(my $child = fork) or fail("fork: $!");
    reply(@answer) if $child;
    open(STDIN, '<', '/dev/null');
    open(STDOUT, '>', '/dev/null');
}

# The next frame within $WAIT seconds; undef if there is none.
sub receive {
    my ($socket) = @_;
    my $ready = '';
    vec($ready, fileno($socket), 1) = 1;
    return undef unless select($ready, undef, undef, $WAIT);
    recv($socket, my $frame, 2048, 0);
    return $frame;
}

sub watch {
    my $socket = listening(0, $ALL);
    for my $nic (values %nics) {
        setsockopt($socket, $SOL_PACKET, $ADD_MEMBERSHIP, pack('i S S a8', $nic->{index}, $PROMISC, 0, '')) or fail("promisc: $!");
    }
    my %names = map { $_->{index} => $_->{name} } values %nics;
    in_background('watch');
    my ($unsaved, %counts) = (0);
    while (1) {
        my $ready = '';
        vec($ready, fileno($socket), 1) = 1;
        my $more = select($ready, undef, undef, $unsaved ? 0.02 : undef);
        if ($more && defined(my $from = recv($socket, my $frame, 2048, 0))) {
            my (undef, undef, $index, undef, $kind) = unpack('S n i S C', $from);
            my $at = rindex($frame, 'ATCK');
            next if $kind == $OUTGOING || $at < 0 || !$names{$index};
            $counts{unpack('N', substr($frame, $at + 4, 4)) . "/$names{$index}"}++;
            next if ++$unsaved < 500;
        }
        open(my $file, '>', "$COUNTS.new") or next;
        print $file join(' ', map { "$_=$counts{$_}" } sort keys %counts), "\n";
        close $file;
        rename("$COUNTS.new", $COUNTS);
        $unsaved = 0;
    }
}

sub counts {
    my ($first, $last) = @_;
    reply(grep { m{^(\d+)/} && $1 >= $first && $1 <= $last } split / /, content($COUNTS));
}

sub transmit {
    my ($mac, $first, $count, @frames) = @_;
    my ($socket, $sent, $failed) = (sender($mac), 0, 0);
    for my $number (0 .. $#frames) {
        my $frame = finish(pack('H*', $frames[$number]), $first + $number);
        for (1 .. $count) { defined send($socket, $frame, 0) ? $sent++ : $failed++ }
    }
    reply("sent=$sent failed=$failed");
}

sub flood {
    my ($mac, $number, $hex) = @_;
    my ($socket, $frame, $sent) = (sender($mac), finish(pack('H*', $hex), $number), 0);
    unlink($STOP, $SENT);
    in_background('flood');
    until (-e $STOP) {
        for (1 .. 16) { $sent++ if defined send($socket, $frame, 0) }
    }
    open(my $file, '>', "$SENT.new");
    print $file "$sent\n";
    close $file;
    rename("$SENT.new", $SENT);
}

sub stop {
    open(my $file, '>', $STOP);
    for (1 .. 1500) {
        reply('sent=' . content($SENT)) if -e $SENT;
        select(undef, undef, undef, 0.02);
    }
    fail('the flood does not end');
}

# Linux 6.12, igbvf/mbx.h and vf.h: registers V2PMAILBOX (0xC40) and VMBMEM (0x800); the PF answers with ACK or NACK.
sub mailbox {
    my ($mac, @words) = @_;
    (my $address = nic($mac)->{device}) =~ s{.*/}{};
    my ($bar) = split / /, content("/sys/bus/pci/devices/$address/resource");
    my $register = sub {
        my ($offset, @value) = @_;
        return oct `/bin/busybox devmem @{[sprintf '0x%x', oct($bar) + $offset]} 32 @value 2>&1`;
    };
    my $reset = now() + 5;
    do { $register->(0xC40, 4) } until ($register->(0xC40) & 4) || now() > $reset;    # VFU: the VF owns the buffer
    $register->(0x800 + 4 * $_, $words[$_]) for 0 .. $#words;
    $register->(0xC40, 1);                                                            # REQ
    my ($answer, $end) = (0, now() + 5);
    do { $answer = $register->(0x800) } until ($answer & 0xC0000000) || now() > $end;
    $register->(0xC40, 2);                                                            # ACK
    reply(sprintf 'answer=0x%08x', $answer);
}

# A frame of the measurement: addresses, EtherType, kind, index in its batch.
sub measuring { my ($target, $source, $kind, $index) = @_; return bytes($target) . bytes($source) . pack('n a4 N', $OWN, $kind, $index) }

sub answer {
    my ($mac) = @_;
    my ($socket, $own, $got) = (sender($mac), bytes($mac), 0);
    in_background('echo');
    while (1) {
        my (undef, undef, undef, undef, $reached) = unpack('S n i S C', recv($socket, my $frame, 2048, 0));
        next if $reached;    # not PACKET_HOST
        my (undef, $source, undef, $kind, $index) = unpack('a6 a6 n a4 N', $frame);
        next if $kind ne 'TRIP' && $kind ne 'RATE';
        $got++ if $kind eq 'RATE';
        next if $kind eq 'RATE' && $index != $BATCH - 1;
        send($socket, $source . $own . pack('n a4 N', $OWN, 'DONE', $got) . "\0" x 38, 0);
        $got = 0;
    }
}

sub trips {
    my ($mac, $target, $count) = @_;
    my ($socket, $lost) = (sender($mac), 0);
    my $frame = measuring($target, $mac, 'TRIP', 0) . "\0" x 38;
    my $begin = now();
    for (1 .. $count) {
        send($socket, $frame, 0);
        $lost++ unless defined receive($socket);
    }
    reply(sprintf 'sent=%d lost=%d seconds=%.6f', 2 * $count, $lost, now() - $begin);
}

sub rate {
    my ($mac, $target, $size, $batches) = @_;
    my ($socket, $lost) = (sender($mac), 0);
    my @frames = map { my $frame = measuring($target, $mac, 'RATE', $_); $frame . "\0" x ($size - length $frame) } 0 .. $BATCH - 1;
    my $begin = now();
    for (1 .. $batches) {
        send($socket, $_, 0) for @frames;
        my $done = receive($socket);
        my $got = defined $done ? unpack('x18 N', $done) : 0;
        $lost += $BATCH - $got;
    }
    reply(sprintf 'sent=%d lost=%d seconds=%.6f', ($BATCH + 1) * $batches, $lost, now() - $begin);
}

my ($command, @arguments) = @ARGV;
my %commands = (
    nics => sub { reply(map { "$_=$nics{$_}{name}" } sort keys %nics) },
    watch => \&watch, counts => \&counts, send => \&transmit, flood => \&flood, stop => \&stop, mailbox => \&mailbox,
    echo => \&answer, trips => \&trips, rate => \&rate,
);
($commands{$command} || sub { fail("unknown command $command") })->(@arguments);
